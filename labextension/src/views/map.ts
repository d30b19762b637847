import type { StateOf, View } from '../view'

export const mapView: View<StateOf<'map'>> = (state, { root }) => {
  root.textContent = state.type
  return { update: () => undefined, event: () => undefined, lost: () => undefined, cleanup: () => undefined }
}
