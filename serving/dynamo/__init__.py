"""The service as a worker of NVIDIA Dynamo, whose frontend answers clients."""
