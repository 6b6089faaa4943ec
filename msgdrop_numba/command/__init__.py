"""The `msgdrop` command and what it runs."""
