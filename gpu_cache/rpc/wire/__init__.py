"""Binary frames and JSON."""
