// Creates a blob container in a running Azurite: `node create-container.mjs PORT CONTAINER`.
//
// The client library of the store cannot create containers, and neither account nor key are secret:
// they are the same in every emulator.

import { createHmac } from "node:crypto";
import { request } from "node:http";

const account = "devstoreaccount1";
const key =
  "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw==";
const [port, container] = process.argv.slice(2);
if (!port || !container) {
  console.error("usage: node create-container.mjs PORT CONTAINER");
  process.exit(2);
}

const date = new Date().toUTCString();
const version = "2021-12-02";
// The verb, eleven empty standard headers, then the x-ms headers and the resource.
const signed =
  `PUT${"\n".repeat(12)}x-ms-date:${date}\nx-ms-version:${version}\n` +
  `/${account}/${account}/${container}\nrestype:container`;
const signature = createHmac("sha256", Buffer.from(key, "base64")).update(signed).digest("base64");

const call = request(
  {
    host: "127.0.0.1",
    port: Number(port),
    method: "PUT",
    path: `/${account}/${container}?restype=container`,
    headers: {
      "x-ms-date": date,
      "x-ms-version": version,
      "content-length": 0,
      authorization: `SharedKey ${account}:${signature}`,
    },
  },
  (answer) => {
    let text = "";
    answer.on("data", (chunk) => (text += chunk));
    answer.on("end", () => {
      const done = answer.statusCode === 201 || answer.statusCode === 409;
      if (!done) {
        console.error(`creating ${container}: ${answer.statusCode} ${text}`);
      }
      process.exitCode = done ? 0 : 1;
    });
  },
);
call.on("error", (error) => {
  console.error(`creating ${container}: ${error.message}`);
  process.exitCode = 1;
});
call.end();
