"""The page and what surrounds it: uploads, rate limit, model servers, ZeroGPU, Spaces, doctor."""
