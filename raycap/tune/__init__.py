"""Which trials, how long, and where: the search space, ASHA over packs, the lease board, the sweep's driver."""
