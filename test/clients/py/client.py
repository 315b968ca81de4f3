# SPDX-License-Identifier: Apache-2.0

"""client.py DIRECTORY gets credentials with the unmodified botocore that is
installed in DIRECTORY, by its default chain, and prints what it got as one
line of JSON, the Result of the Go package clients: never a secret. Exit
status 0: credentials; 1: none; 2: used wrongly.
"""

import json
import os
import sys
import time

if len(sys.argv) != 2:
    print("usage: client.py DIRECTORY", file=sys.stderr)
    sys.exit(2)
# A pod does not have this file system: nothing is written to it.
sys.dont_write_bytecode = True
sys.path.insert(0, sys.argv[1])

import botocore.session  # noqa: E402


def redact(text):
    """An SDK or a server may quote what it was sent."""
    tokens = [os.environ.get("AWS_CONTAINER_AUTHORIZATION_TOKEN", "")]
    try:
        with open(os.environ["AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE"]) as file:
            tokens.append(file.read())
    except (KeyError, OSError):
        pass  # No file: nothing of it can be in the text.
    for token in tokens:
        for form in (token, token.strip()):
            if form:
                text = text.replace(form, "[token]")
    return text


start = time.monotonic()
result = {}
try:
    credentials = botocore.session.Session().get_credentials()
    if credentials is None:
        raise RuntimeError("no provider of the chain has credentials")
    result["access_key_id"] = credentials.get_frozen_credentials().access_key
    result["account_id"] = getattr(credentials, "account_id", None) or ""
    result["expires"] = credentials._expiry_time.isoformat()
    result["source"] = credentials.method
except Exception as error:  # noqa: BLE001: whatever it is, it is reported
    result["error"] = redact(f"{type(error).__name__}: {error}")
result["duration_ms"] = (time.monotonic() - start) * 1000
print(json.dumps(result))
sys.exit(1 if "error" in result else 0)
