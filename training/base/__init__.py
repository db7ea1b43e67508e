"""What every program here stands on; it imports nothing else of this project."""
