"""DISC-Law-Eval: its questions, how a model is asked, how letters are read from an answer, and what is right."""
