"""The process: everything that knows gRPC servers, signals and sockets."""
