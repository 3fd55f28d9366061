"""Plans in files: the directory that ``dump`` writes and ``load`` reads, the cache of plans, and their keys."""
