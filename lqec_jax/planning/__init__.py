"""What a compression will take, from config.json and file headers alone."""
