"""Model files on the user's disk: which are known, how they come there, where they are."""
