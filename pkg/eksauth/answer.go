// SPDX-License-Identifier: Apache-2.0

package eksauth

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"math"
	"time"
)

// Secret is a text that does not show itself: printed, logged or encoded, it is
// "[redacted]". Only Reveal gives it away.
type Secret struct {
	// A pointer, because fmt prints the insides of values in other types'
	// unexported fields without asking their methods; of a pointer it prints the
	// address.
	value *string
}

const redacted = "[redacted]"

// NewSecret wraps a text.
func NewSecret(text string) Secret { return Secret{&text} }

// Reveal gives the text itself.
func (s Secret) Reveal() string {
	if s.value == nil {
		return ""
	}
	return *s.value
}

// String hides the text.
func (s Secret) String() string { return redacted }

// GoString hides the text from %#v.
func (s Secret) GoString() string { return redacted }

// LogValue hides the text from slog.
func (s Secret) LogValue() slog.Value { return slog.StringValue(redacted) }

// MarshalText hides the text from encoders.
func (s Secret) MarshalText() ([]byte, error) { return []byte(redacted), nil }

// MarshalJSON hides the text from JSON.
func (s Secret) MarshalJSON() ([]byte, error) { return []byte(`"` + redacted + `"`), nil }

// Subject is whom the service found the token to speak for.
type Subject struct {
	Namespace      string
	ServiceAccount string
}

// Credentials are temporary AWS credentials.
type Credentials struct {
	AccessKeyID     string
	SecretAccessKey Secret
	SessionToken    Secret
	// Expiration in UTC, whole seconds, rounded down.
	Expiration time.Time
}

// Result is the service's answer, complete.
type Result struct {
	Subject        Subject
	Audience       string
	AssociationARN string
	AssociationID  string
	// AssumedRoleARN is that of the STS session, AssumedRoleID its id.
	AssumedRoleARN string
	AssumedRoleID  string
	Credentials    Credentials
	// RequestID is from header x-amzn-RequestId.
	RequestID string
}

// latestExpiration is the last moment that RFC 3339 can write; later ones are
// milliseconds mistaken for seconds, or garbage.
var latestExpiration = time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC)

// decode reads a 200. Every member that the service's model requires must be
// there: half an answer is refused whole, and never makes anything panic.
func decode(body []byte, now time.Time) (*Result, error) {
	var in struct {
		Subject *struct {
			Namespace      string `json:"namespace"`
			ServiceAccount string `json:"serviceAccount"`
		} `json:"subject"`
		Audience    string `json:"audience"`
		Association *struct {
			ARN string `json:"associationArn"`
			ID  string `json:"associationId"`
		} `json:"podIdentityAssociation"`
		AssumedRole *struct {
			ARN string `json:"arn"`
			ID  string `json:"assumeRoleId"`
		} `json:"assumedRoleUser"`
		Credentials *struct {
			AccessKeyID     string   `json:"accessKeyId"`
			SecretAccessKey string   `json:"secretAccessKey"`
			SessionToken    string   `json:"sessionToken"`
			Expiration      *float64 `json:"expiration"`
		} `json:"credentials"`
	}
	if err := json.Unmarshal(body, &in); err != nil {
		// The error's own text may quote the body, and with it a secret.
		return nil, fmt.Errorf("%w: it cannot be decoded", ErrInvalidResponse)
	}
	missing := func(member string) (*Result, error) {
		return nil, fmt.Errorf("%w: no %s", ErrInvalidResponse, member)
	}
	switch {
	case in.Subject == nil || in.Subject.Namespace == "" || in.Subject.ServiceAccount == "":
		return missing("subject")
	case in.Audience == "":
		return missing("audience")
	case in.Association == nil || in.Association.ARN == "" || in.Association.ID == "":
		return missing("podIdentityAssociation")
	case in.AssumedRole == nil || in.AssumedRole.ARN == "" || in.AssumedRole.ID == "":
		return missing("assumedRoleUser")
	case in.Credentials == nil:
		return missing("credentials")
	case in.Credentials.AccessKeyID == "":
		return missing("credentials.accessKeyId")
	case in.Credentials.SecretAccessKey == "":
		return missing("credentials.secretAccessKey")
	case in.Credentials.SessionToken == "":
		return missing("credentials.sessionToken")
	case in.Credentials.Expiration == nil:
		return missing("credentials.expiration")
	}
	seconds := math.Floor(*in.Credentials.Expiration)
	if seconds > float64(latestExpiration.Unix()) {
		return nil, fmt.Errorf("%w: credentials.expiration is no time in seconds", ErrInvalidResponse)
	}
	if seconds <= float64(now.Unix()) {
		return nil, fmt.Errorf("%w: its credentials have expired", ErrInvalidResponse)
	}
	return &Result{
		Subject:        Subject(*in.Subject),
		Audience:       in.Audience,
		AssociationARN: in.Association.ARN,
		AssociationID:  in.Association.ID,
		AssumedRoleARN: in.AssumedRole.ARN,
		AssumedRoleID:  in.AssumedRole.ID,
		Credentials: Credentials{
			AccessKeyID:     in.Credentials.AccessKeyID,
			SecretAccessKey: NewSecret(in.Credentials.SecretAccessKey),
			SessionToken:    NewSecret(in.Credentials.SessionToken),
			Expiration:      time.Unix(int64(seconds), 0).UTC(),
		},
	}, nil
}
