"""The parts of :class:`~vllm_model.cuda_backend.CudaBackend`: what is on the device, and the kinds of steps that run there."""
