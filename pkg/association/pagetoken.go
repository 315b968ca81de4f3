// SPDX-License-Identifier: Apache-2.0

package association

import (
	"crypto/sha256"
	"encoding/base64"
)

// A page token is a version, the last ID of the page before, and a digest that
// binds both to the cluster and the filters. It is no secret, and gives no
// rights: who makes one up reads on from where he says, in what he may list
// anyway. The digest is there so that a damaged token, or one of another list,
// is refused and does not silently leave something out.
const (
	pageTokenVersion = 1
	pageTokenSum     = 16
	pageTokenBytes   = 1 + IDLength + pageTokenSum
)

func pageTokenDigest(in ListInput, id string) []byte {
	h := sha256.New()
	for _, s := range []string{"latchkey page token 1", in.Cluster, in.Namespace, in.ServiceAccount, id} {
		h.Write([]byte(s))
		h.Write([]byte{0})
	}
	return h.Sum(nil)[:pageTokenSum]
}

func pageToken(in ListInput, id string) string {
	b := make([]byte, 0, pageTokenBytes)
	b = append(b, pageTokenVersion)
	b = append(b, id...)
	b = append(b, pageTokenDigest(in, id)...)
	return base64.RawURLEncoding.EncodeToString(b)
}

// parsePageToken returns the last ID of the page before.
func parsePageToken(in ListInput) (string, error) {
	bad := invalid(in.Cluster, "The parameter nextToken is not valid for this list.")
	b, err := base64.RawURLEncoding.Strict().DecodeString(in.NextToken)
	if err != nil || len(b) != pageTokenBytes || b[0] != pageTokenVersion {
		return "", bad
	}
	id := string(b[1 : 1+IDLength])
	if _, ok := slotOf(id); !ok || pageToken(in, id) != in.NextToken {
		return "", bad
	}
	return id, nil
}
