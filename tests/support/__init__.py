"""What the tests share: commands started as people start them, trained runs, stand-ins for what is elsewhere."""
