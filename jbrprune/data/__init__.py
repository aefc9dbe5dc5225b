"""Images, batches, and the processes that share them."""
