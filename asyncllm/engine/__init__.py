"""The engine thread: step loop, scheduler, sequences, block pool. No torch, no asyncio."""
