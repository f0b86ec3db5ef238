"""Several opinions on a row, and one answer: linear heads on hidden states and on embeddings, and how much each counts."""
