"""What every part uses: errors, files, processes, progress, statistics."""
