"""How a run is started: its options, its surroundings, its words on the screen."""

import training as training  # before any library: see there
