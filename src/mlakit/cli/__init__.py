"""The `mlakit` command: one small module a subcommand, and no logic. Nothing slow is imported until a subcommand runs."""
