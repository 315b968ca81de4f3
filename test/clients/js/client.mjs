// SPDX-License-Identifier: Apache-2.0

// client.mjs gets credentials with an unmodified provider of the AWS SDK for
// JavaScript v3 and prints what it got as one line of JSON, the Result of the
// Go package clients: never a secret. Exit status 0: credentials; 1: none;
// 2: used wrongly.
//
//     node client.mjs http        @aws-sdk/credential-provider-http
//     node client.mjs metadata    fromContainerMetadata of @smithy/credential-provider-imds

import { readFileSync, writeSync } from "node:fs";
import { fromHttp } from "@aws-sdk/credential-provider-http";
import { fromContainerMetadata } from "@smithy/credential-provider-imds";

const providers = {
  http: { source: "credential-provider-http", make: () => fromHttp({}) },
  metadata: { source: "fromContainerMetadata", make: () => fromContainerMetadata({}) },
};

// An SDK or a server may quote what it was sent.
function redact(text) {
  const tokens = [process.env.AWS_CONTAINER_AUTHORIZATION_TOKEN ?? ""];
  try {
    tokens.push(readFileSync(process.env.AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE, "utf8"));
  } catch {
    // No file: nothing of it can be in the text.
  }
  for (const token of tokens.flatMap((t) => [t, t.trim()])) {
    if (token !== "") {
      text = text.replaceAll(token, "[token]");
    }
  }
  return text;
}

const provider = providers[process.argv[2]];
if (provider === undefined || process.argv.length !== 3) {
  console.error(`usage: node client.mjs ${Object.keys(providers).join("|")}`);
  process.exit(2);
}

const start = performance.now();
const result = {};
try {
  const credentials = await provider.make()();
  result.access_key_id = credentials.accessKeyId;
  result.account_id = credentials.accountId;
  result.expires = credentials.expiration?.toISOString();
  result.source = provider.source;
} catch (error) {
  // As Node prints an error that nobody catches: its own properties too. The
  // HTTP provider puts the server's Code and Message there.
  const own = Object.entries(error).filter(([name, value]) => name !== "name" && typeof value === "string").map(([name, value]) => `${name}: ${value}`);
  result.error = redact([`${error.name}: ${error.message}`, ...own].join("; "));
}
result.duration_ms = Math.round((performance.now() - start) * 1000) / 1000;
// Synchronous, because process.exit does not wait for a pipe to drain; and
// exit, because a kept-alive connection would hold the process up.
writeSync(1, JSON.stringify(result) + "\n");
process.exit(result.error === undefined ? 0 : 1);
