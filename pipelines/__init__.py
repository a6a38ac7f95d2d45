"""Ray Data pipelines: sources and partitions in, partitions processed by a pool of actors."""
