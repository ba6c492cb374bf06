"""llama-corral: run llama-index workflows as services under structured concurrency."""
