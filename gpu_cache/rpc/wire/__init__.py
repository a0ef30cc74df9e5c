"""What travels: binary frames and JSON."""
