"""How a run is started: its options, its surroundings, its words on the screen."""
