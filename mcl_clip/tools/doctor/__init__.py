"""What will fail, or go badly, in a job: found before it runs. Nothing is written; of the data a sample is read."""
