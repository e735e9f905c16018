"""What people look at: curves and comparison pages, made from finished files."""
