// SPDX-License-Identifier: Apache-2.0

package wire

import (
	"crypto/rand"
	"encoding/base32"
	"encoding/base64"
	"encoding/hex"
	"strings"
)

// Marks by which everything that a stand-in issues can be told from the real
// service's.
const (
	// AccessKeyPrefix begins every access key id, which has 20 characters.
	AccessKeyPrefix = "ASIASTANDIN"
	// SecretPrefix begins every secret access key, which has 40 characters.
	SecretPrefix = "standin/"
	// SessionTokenPrefix begins every session token.
	SessionTokenPrefix = "STANDIN//"
)

// Credentials makes up credentials with a session token of so many bytes.
func Credentials(tokenBytes int) (accessKeyID, secretAccessKey, sessionToken string) {
	return AccessKeyPrefix + RandomText(20-len(AccessKeyPrefix)),
		SecretPrefix + randomBase64(40-len(SecretPrefix)),
		SessionTokenPrefix + randomBase64(max(0, tokenBytes-len(SessionTokenPrefix)))
}

// RoleID makes up the unique id of a role.
func RoleID() string { return "AROASTANDIN" + RandomText(10) }

// RandomText is n characters of A to Z and 2 to 7.
func RandomText(n int) string { return base32.StdEncoding.EncodeToString(randomBytes(n))[:n] }

// RequestID is a random UUID, as services name requests.
func RequestID() string {
	b := randomBytes(16)
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	h := hex.EncodeToString(b)
	return strings.Join([]string{h[:8], h[8:12], h[12:16], h[16:20], h[20:]}, "-")
}

func randomBase64(n int) string { return base64.StdEncoding.EncodeToString(randomBytes(n))[:n] }

func randomBytes(n int) []byte {
	b := make([]byte, n)
	_, _ = rand.Read(b) // never fails since Go 1.24
	return b
}
