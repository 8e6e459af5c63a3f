"""What TTD costs beside a contrastive step: time, memory and counted operations, and how they grow."""
