"""What a user starts: the ``cotam`` command, one module a subcommand."""
