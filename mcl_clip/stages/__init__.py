"""What happens between the stages: embedding, clusters, pseudo-labels, combination."""
