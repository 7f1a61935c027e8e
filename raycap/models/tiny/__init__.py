"""The tiny GIT that ships with raycap, and what builds it and models like it."""
