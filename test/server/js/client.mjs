// SPDX-License-Identifier: Apache-2.0

// client.mjs calls the EKS API with an unmodified @aws-sdk/client-eks. Its
// standard input is one JSON object a line, {"call": "ListPodIdentityAssociations",
// "input": {…}}; for each it prints one line, {"output": {…}} or {"error":
// {"name", "message", "status"}}. Endpoint, region and keys come from the
// environment, as for any program.

import { createInterface } from "node:readline";
import * as eks from "@aws-sdk/client-eks";

const client = new eks.EKSClient({ maxAttempts: 1 });
for await (const line of createInterface({ input: process.stdin })) {
  const { call, input } = JSON.parse(line);
  let answer;
  try {
    const { $metadata, ...output } = await client.send(new eks[`${call}Command`](input));
    answer = { output, status: $metadata.httpStatusCode };
  } catch (error) {
    answer = {
      error: {
        name: error.name,
        message: error.message,
        // Modelled errors are instances of the SDK's own classes.
        modelled: error instanceof eks.EKSServiceException && eks[error.name] !== undefined,
        status: error.$metadata?.httpStatusCode,
        requestId: error.$metadata?.requestId,
      },
    };
  }
  console.log(JSON.stringify(answer));
}
