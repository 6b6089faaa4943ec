"""One call, whatever the array library: rule, request and checks, rows and keys, plan and launch."""
