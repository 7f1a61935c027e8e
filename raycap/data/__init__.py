"""From a user's images and captions to cleaned shards, a stream, and the store that training reads by index."""
