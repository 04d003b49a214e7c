"""Read, score and compare what runs measured; `record` reads a run, `text` formats its results."""
