"""Infrastructure that AReaL users import by these names."""
