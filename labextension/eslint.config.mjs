import js from '@eslint/js'
import tseslint from 'typescript-eslint'

// What strangers wrote reaches the page as text only: nothing here parses HTML or runs a string.
const asText = 'Write text with textContent: what a model or a file says must never be parsed as HTML.'
const forbidden = ['innerHTML', 'outerHTML', 'srcdoc'].map(name => ({
  selector: `AssignmentExpression[left.property.name="${name}"]`,
  message: asText,
}))
const parsing = ['insertAdjacentHTML', 'setHTMLUnsafe', 'parseFromString', 'createContextualFragment', 'write']
  .map(name => ({ selector: `CallExpression[callee.property.name="${name}"]`, message: asText }))

export default tseslint.config(
  { ignores: ['node_modules', '../llm_magic/static'] },
  js.configs.recommended,
  ...tseslint.configs.strict,
  {
    rules: {
      eqeqeq: 'error',
      'no-eval': 'error',
      'no-implied-eval': 'error',
      'no-new-func': 'error',
      'no-restricted-syntax': ['error', ...forbidden, ...parsing],
      'no-console': ['error', { allow: ['warn'] }],
      '@typescript-eslint/no-non-null-assertion': 'error',
    },
  },
  { files: ['*.mjs'], languageOptions: { globals: { process: 'readonly' } } },
)
