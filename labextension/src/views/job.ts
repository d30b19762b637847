import type { StateOf, View } from '../view'

export const jobView: View<StateOf<'job'>> = (state, { root }) => {
  root.textContent = state.type
  return { update: () => undefined, event: () => undefined, lost: () => undefined, cleanup: () => undefined }
}
