"""The `mlakit` command: one small module a subcommand, and no logic. Nothing slow is imported before one runs."""
