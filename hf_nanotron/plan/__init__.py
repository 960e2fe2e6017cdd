"""What a layout costs, and whether it runs, before a GPU is rented."""
