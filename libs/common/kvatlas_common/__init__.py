"""What the services have in common."""

from kvatlas_common import grpc_core

grpc_core.settle()  # before anything imports grpc
