#!/usr/bin/env python3
"""server.py [PORT]: the server outside. It answers each GET with the peer's address, keeps connections open, and writes
a line for each: the peer's address and the path that was asked for."""
import http.server
import os
import socket
import sys


class Answer(http.server.BaseHTTPRequestHandler):
    """Answers with the address that the connection comes from."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self):
        peer = self.client_address[0].removeprefix("::ffff:")
        # One write, so that the lines of several threads do not mix.
        os.write(1, f"{peer} {self.path}\n".encode())
        body = (peer + "\n").encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        """The line above is the whole log."""


class Server(http.server.ThreadingHTTPServer):
    """Listens for IPv6 and for IPv4."""

    address_family = socket.AF_INET6
    # A pod is deleted without closing its connections.
    daemon_threads = True
    request_queue_size = 1024

    def handle_error(self, *_):
        """Nor when they are reset."""


Server(("::", int(sys.argv[1]) if len(sys.argv) > 1 else 8080), Answer).serve_forever()
