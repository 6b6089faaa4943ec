"""What one call asks for, whatever the array: rule, request and checks, rows and keys, plan and launch."""
