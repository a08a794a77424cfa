"""From a request to video: prompts, pictures, tiles, clips."""
