"""Several opinions on a row, and one answer: a linear head on the frozen model's hidden states, and how much each counts."""
