"""Where a step's memory and time go. Measuring changes nothing of what is learned."""
