"""The device seam."""
