"""Raw text to prepared data sets on disk."""

import training as training  # before any library: see there
