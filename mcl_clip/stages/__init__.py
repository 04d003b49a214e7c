"""What runs between the stages: embedding, clusters, pseudo-labels, combination."""
