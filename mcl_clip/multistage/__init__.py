"""What happens between stages: embed, cluster, label."""
