"""Training: one program for each kind of model, and the loop that they share."""
